"""The values that all other packages pass around: surveys, plans, file layouts, costs, budgets."""
