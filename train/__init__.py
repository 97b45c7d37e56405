"""Step-level training: rollouts, advantages, losses and the loop that DPO and DDPO share."""
