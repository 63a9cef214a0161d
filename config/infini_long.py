# Infini-Pythia trained on stretches of documents, window after window; the memory is carried from one to the next.
model = "infini"
block_size = 512
tokens_per_doc = 4096  # eight windows
