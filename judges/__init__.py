"""Who decides where no string match can: judges of instruction following and of safety."""
