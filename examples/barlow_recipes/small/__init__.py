"""One table on the data that need no download: what encoders are worth that were pretrained in minutes."""
