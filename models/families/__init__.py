"""How each family's Hugging Face layout maps onto the canonical block: tables, and the reading of config.json.

The families run the same block; they differ in which variants of it they use and in the defaults of keys that
config.json leaves out. Adding a family of this shape is adding a row. This room knows no torch and no BlockConfig: it
gives plain values, which models/config.py validates.
"""

from models.families.reading import ConfigRead, read_config
from models.families.table import FAMILIES, Family

__all__ = ["FAMILIES", "ConfigRead", "Family", "read_config"]
