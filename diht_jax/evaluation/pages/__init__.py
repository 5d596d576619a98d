"""Pictures for people: result pages of evaluations."""
