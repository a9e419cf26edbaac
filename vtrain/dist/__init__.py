"""Process groups, sharding and collectives. Imports torch only."""
