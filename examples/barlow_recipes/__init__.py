"""The parts of ``imagenet_pretrain.py``, each small enough to read, copy and replace."""
