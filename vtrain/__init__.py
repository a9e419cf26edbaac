"""vtrain: a performance-first trainer for models over visual tokens."""

from pkgutil import extend_path

# Started in a checkout that was not built, Python finds the checkout's vtrain first: its `_host` is then that of the
# installed wheel. What the checkout has comes before.
__path__ = extend_path(__path__, __name__)
