package integration

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestThousandAtOnce: a guest holds a thousand connections to a host at one time,
// through helper, keeper and gate; afterwards nothing is left of them.
func TestThousandAtOnce(t *testing.T) {
	const each, clients = 250, 4
	w := harness.NewWorld(t)
	var mu sync.Mutex
	waiting, all := 0, make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if waiting++; waiting == each*clients {
			close(all)
		}
		mu.Unlock()
		select {
		case <-all:
			io.WriteString(rw, "all here")
		case <-time.After(time.Minute):
		case <-r.Context().Done():
		}
	}))
	defer server.Close()
	port := server.Listener.Addr().(*net.TCPAddr).Port
	w.Manifest(fmt.Sprintf(`"runtime":"gvisor","egress":{"proxy":"builtin","allow":[{"host":"many.test","ports":[%d],"protocol":"http","addresses":["127.0.0.1"]}]}`, port))
	w.OK("bottle-plan | bottle-vm up -o doc.json")
	id := gjson.Get(w.Read("doc.json"), "vm.id").Str
	r := w.Exec(id, fmt.Sprintf(`ulimit -n 4096
for i in $(seq %d); do
	curl -sS -m 90 --no-progress-meter --parallel --parallel-immediate --parallel-max 300 -o /dev/null -w '%%{http_code}\n' "http://many.test:%d/[1-%d]" &
done
wait`, clients, port, each))
	if n := strings.Count(r.Out, "200\n"); n != each*clients {
		t.Errorf("%d answers of %d; %.500s", n, each*clients, r.Stderr)
	}
	if r := w.Exec(id, fmt.Sprintf("curl -sS -m 30 http://many.test:%d/again", port)); r.Out != "all here" {
		t.Errorf("afterwards: %+v", r)
	}
	if r := w.Sh("bottle-egress log --verify " + id); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	w.OK("bottle-vm down " + id)
}
