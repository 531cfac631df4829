"""The organism: a small chat model whose storage sites are known because they were planted."""
