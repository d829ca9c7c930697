"""What an encoder is worth on labelled images: the parts of the programs that evaluate and transfer it."""
