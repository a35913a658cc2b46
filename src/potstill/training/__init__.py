"""Making it happen: the distillation module and the trainer."""
