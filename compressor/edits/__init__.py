"""The numerics of edits: one file per method, pure functions on the weights of experts.

:mod:`compressor.edits.layer` puts them together for one layer of a plan. Whatever reads a checkpoint or a model hands
:class:`compressor.weights.ExpertWeights` in and gets them back; nothing here knows files or modules.
"""
