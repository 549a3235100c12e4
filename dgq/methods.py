"""The quantization methods, an entry each; what they answer is told in `dgq.method`."""

from .integer.convrot import CONVROT
from .integer.method import INTEGER
from .method import METHODS
from .paper.method import PAPER

METHODS.update({method.name: method for method in (INTEGER, PAPER, CONVROT)})
