# A layer for GPUs, on top of any model: Pythia's own recipe on the Pile (python prep.py --dataset=pile first).
dataset = "pile"
block_size = 2048
gradient_accumulation_steps = 256  # 4 windows x 256 x 2,048 = 2 M tokens a step, shared out among the GPUs
max_iters = 143000  # 300 B tokens
warmup_iters = 1430
learning_rate = 1e-3
min_lr = 1e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 1000
eval_iters = 100
