"""Parts of examples/train_mlp.py: an MLP on MNIST that proves torch_bn against torch.nn."""
