"""`stepfuse benchmark`: the cost of sampling, training and rewards, beside baselines."""
