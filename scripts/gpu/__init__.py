"""`scripts/gpu_check`: what can only be tested and measured on a GPU, in parts that end one by one."""
