"""Models as checkpoints, tokenizers and chats: what lies in a folder, what the hub has, what may be opened."""
