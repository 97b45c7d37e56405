"""`stepfuse benchmark`: the cost of sampling, training, rewards and serving, beside baselines."""
