#!/bin/sh
# What udhcpc runs: it applies a lease, and writes what the server said to /tmp/dhcp.INTERFACE.
case $1 in
  deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
  bound | renew)
    for name in ip mask subnet router dns mtu domain lease serverid; do
      eval "value=\${$name:-}"
      [ -z "$value" ] || echo "$name=$value"
    done >"/tmp/dhcp.$interface"
    [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    for gateway in $router; do
      ip route replace default via "$gateway" dev "$interface"
      break
    done
    : >/etc/resolv.conf
    for server in $dns; do
      echo "nameserver $server" >>/etc/resolv.conf
    done
    ;;
esac
