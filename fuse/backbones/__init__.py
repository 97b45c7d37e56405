"""Model families: what is told to a network, what it predicts, and how latents become pixels."""
