"""Other implementations that `stepfuse benchmark` compares with, restated or in environments; not in the wheel."""
