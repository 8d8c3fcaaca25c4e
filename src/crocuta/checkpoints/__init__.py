"""Weights and folders on disk.

load, format, keymap     a path to a model: which format, which names and layouts, tensor by tensor
native, commit, files    our own folders and safetensors, written whole or not at all
families                 published layouts: one module each, with what it needs
torch_save               files of torch.save, read as data
settings, sources        published descriptions and weights files, as the families see them
convert, describe, hub   layouts written back; names resolved to folders
"""
