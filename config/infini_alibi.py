# Infini-Pythia whose memory fades by exp(-slope) with every segment, ALiBi's slopes.
model = "infini"
use_alibi = True
