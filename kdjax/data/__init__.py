"""Problems to batches: datasets, tasks, tokenizers and chat templates."""
