"""Model families: the inputs and predictions of a network, and the conversion of latents to pixels and back."""
