"""The values that all else passes on: surveys, plans, what files hold, costs, budgets."""
