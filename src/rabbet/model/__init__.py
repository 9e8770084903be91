"""Networks: inspected, copied, folded, and rebuilt with compressed layers."""
