"""Networks: looked at, copied, folded, and rebuilt with compressed layers."""
