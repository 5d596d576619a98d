"""Pictures: decoding, and the transforms of training and evaluation."""
