"""`stepfuse serve`: draw images of adapter sets over HTTP, and the page with the weights' sliders."""
