"""What runs beside or inside a serving engine."""
