"""Terms of the training objective beside the contrastive loss."""
