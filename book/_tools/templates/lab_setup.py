import sys

if "google.colab" in sys.modules:  # keep Colab's own torch
    %pip install -q "lossbook[lab] @ git+$repository"

from lossbook import lab

run = lab.start()
