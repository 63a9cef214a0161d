# Infini-Pythia with two memory banks, mixed by a learned share per head and bank.
model = "infini"
num_memory_banks = 2
segments_per_bank = 4  # then it is the other bank's turn
