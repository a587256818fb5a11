"""The product's selector (`hedged`) and those that it is compared with, one file each, behind one interface
(`base`)."""
