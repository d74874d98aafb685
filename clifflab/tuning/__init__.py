"""Fine-tuning on chosen examples: masks, batches, the loop, adapters. Knows nothing of Ray."""
