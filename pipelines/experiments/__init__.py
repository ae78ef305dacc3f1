"""Experiments: arms, which are recipes by name, trained with several seeds and compared.

The steps ``ablate`` and ``compare`` share this package. Its trials run under Ray Tune and are reused by identity.
"""
