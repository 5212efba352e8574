#!/bin/sh
# The first program of a guest. It serves the terminal that the parameter vmring.agent names: it
# runs each script that comes, and reports how the script ended.
export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/root LC_ALL=C
# Without /proc, busybox does not find its own programs.
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for word in $(cat /proc/cmdline); do
  case $word in
    vmring.agent=*) agent=/dev/${word#*=} ;;
    vmring.macs=*) macs=${word#*=} ;;
  esac
done
for module in $(cat /lib/modules/order); do
  insmod "/lib/modules/$module"
done
ip link set lo up
# User-mode Linux calls the interfaces of its own transports vec0, vec1, and so on.
n=0
for path in /sys/class/net/vec*; do
  [ -e "$path" ] || continue
  ip link set "${path##*/}" name "eth$n"
  n=$((n + 1))
done
# It has no option for the address of a vhost-user device either.
n=0
for mac in $(echo "$macs" | tr , ' '); do
  ip link set "eth$n" address "$mac"
  n=$((n + 1))
done
cd /root
exec <"$agent" >"$agent" 2>&1
stty raw -echo
printf '\036ready\n'
# A script comes in pieces, one on a line, in hexadecimal. A piece has the word "more" or, if it is
# the last one, the script's number before it. The loop runs in a child, because a signal about the
# end of an orphan, which the first process gets, would make `read` lose what it has read.
(
  while read -r word piece; do
    echo "$piece" | xxd -r -p >>/tmp/script
    if [ "$word" = more ]; then
      printf '\036more\n'
      continue
    fi
    mv /tmp/script /tmp/running
    sh /tmp/running </dev/null
    printf '\036end %s %s\n' "$word" "$?"
  done
)
poweroff -f
