"""Load for a server, for maintainers: what it does under hours of mixed requests. Not part of the package."""
