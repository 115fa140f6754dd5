"""Training stages: transformers' Trainer with kept zeros, fake quantization and distillation.

`arguments` reads what is asked for, `masks` keeps zeros, `trainer` trains, `stage` goes from checkpoint to checkpoint.
"""
