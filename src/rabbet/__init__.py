"""rabbet"""
