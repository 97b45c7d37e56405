"""Step-level training: rollouts, credit, losses and the loop that DPO and DDPO share."""
