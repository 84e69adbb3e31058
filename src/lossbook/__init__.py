"""Losses, optimizers and estimators from the papers of *What Learning Minimizes*.

Each paper is one module, ``lossbook.<part>.<slug>``; the chapter, the lab and the tests of the same name derive it, run it
and check it. Importing ``lossbook`` needs torch and numpy only.
"""

__version__ = "0.1.0"
