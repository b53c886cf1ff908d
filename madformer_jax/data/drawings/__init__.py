"""Source `drawings`: pictures, their attributes and their captions."""
