"""Host-side data: chats to token ids and loss masks, JSONL of chats, Grain batches, and the embedded corpus.

In: JSONL files and tokenizers. Out: `records.TrainBatch`. Never imports jax or flax and knows nothing about models.
"""
