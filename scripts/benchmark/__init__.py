"""`stepfuse benchmark`: what fusion costs, beside other ways to do the same."""
