"""Adapters and adapter sets as folders, on the hub, and in other tools' formats."""
