"""provisional"""

from client.metalearning.selectors.forest import Forest as Hedged
