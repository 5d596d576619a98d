"""Terms of the training objective other than the contrastive loss."""
