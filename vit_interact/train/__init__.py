"""Training and fine-tuning with the indicator alongside; `train.py` reads top to bottom."""
