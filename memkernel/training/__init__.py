"""Training a small MemoryLLM from scratch on generated facts, after arXiv 2402.04624, section 3.2.

words.py, facts.py    what there is to be told and asked; a fifth of all words is held out
vocabulary.py         the tokenizer, and the codes of words
structure.py          the heads that training begins with
episodes.py           what a step reads and writes: the three tasks and the curriculum
differentiable.py     the engine's forward with gradients, a pool for each sequence
train.py              the loop, its checkpoints, and the published layout that comes out
"""
