"""Tensors of LoRAs: reading, writing and converting files, and running several in one forward."""
